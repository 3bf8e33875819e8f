"""What remains of a run. Nothing here runs inside a control loop.

inference_log.py    every step with its pictures; replay_log.py asks a server the same again
evaluation.py       figures, judgements and videos of each episode; report.py makes a page of them
dataset_writer.py   the episodes as a LeRobot v3.0 dataset; rerun_record.py the run as rollout.rrd

video.py, statistics.py, steps.py, files.py    what those are made of
plots.py, episode_plot.py, replay_report.py    pictures and tables
"""
