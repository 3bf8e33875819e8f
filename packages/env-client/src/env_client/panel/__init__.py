"""The browser page of a run: see what the policy sees and wants, stop the arm, judge the episode.

config.py    where it listens, and the socket that is taken before anything moves
panel.py     the consumer of the sidecar: ticks in, updates for the door out
process.py   the door's own process, which nobody who computes shares; commands.py: its way to the control process
live.py      what each browser gets, newest first; a slow one gets less and holds up nobody
door.py      HTTP and WebSocket: the page, the live data, the way to the 3D view; guard.py: who may pass
scene.py     the arm in 3D, drawn by viser; robot.py: action values -> joint angles
page/        HTML, CSS and JavaScript as they are served

What steers the robot goes through our own WebSocket and never through viser: viser takes any web page's connection.
"""
