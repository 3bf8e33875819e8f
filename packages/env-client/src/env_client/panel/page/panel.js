// The panel's page. One WebSocket: updates come in (JSON, then the JPEGs that it names), commands go out.
// An update is answered with {"drawn": 1} when it is on the screen; only then the next one comes, so nothing queues up.
"use strict";

const $ = (id) => document.getElementById(id);
const PHASES = {
  starting: "Preparing", teleoperation: "Leader moves the arm", moving: "Moving", running: "Running", paused: "On hold",
  waiting: "Waiting for Start", judging: "Ended: judge it, then Start", finished: "Finished", leaving: "To the rest pose",
  lost: "Not connected", none: "Connecting …",
};
const ACTIVE = ["starting", "teleoperation", "moving", "running", "paused", "leaving"];
const WINDOW_S = 10;
const PLOTS_MS = 100;

let socket = null;
let run = null;
let state = { phase: "none" };
let rows = [];
let chunk = null;
let awaited = []; // cameras whose JPEG is still to come, and canvases by camera
const tiles = new Map();
let plots = [];
let redraw = 0; // the timer of the next drawing of the curves

// ------------------------------------------------------------------------------------------------- connection

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  socket.binaryType = "blob";
  socket.onopen = () => notice("");
  socket.onmessage = (message) => (typeof message.data === "string" ? update(JSON.parse(message.data)) : picture(message.data));
  socket.onclose = async () => {
    state = { ...state, phase: "lost" };
    show();
    const answer = await fetch("/", { method: "HEAD" }).catch(() => null);
    notice(answer && answer.status === 401
      ? "This run has another token: open the URL that it printed."
      : "Not connected: the run has ended or is about to begin. This page waits for it. What it shows is old.");
    setTimeout(connect, 700);
  };
}

function send(command) {
  const open = socket !== null && socket.readyState === WebSocket.OPEN;
  if (open) socket.send(JSON.stringify(command));
  else notice(`“${command.name}” did not reach the robot: there is no connection. Use the terminal or the power switch.`);
  return open;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = text === "";
}

// ------------------------------------------------------------------------------------------------------ updates

function update(news) {
  if (news.run) begin(news.run);
  if (news.state) { state = news.state; stopped(); }
  if ("chunk" in news) chunk = news.chunk;
  if (news.rows) rows = rows.concat(news.rows).slice(-1500);
  if (news.status) status(news.status);
  if (news.run || news.state) show();
  // Curves are drawn less often than pictures: a page that is busy drawing hears a press on Stop late.
  if (news.rows || "chunk" in news) redraw ||= setTimeout(() => { redraw = 0; drawPlots(); }, PLOTS_MS);
  awaited = news.images.slice();
  if (awaited.length === 0) drawn();
}

async function picture(blob) {
  const camera = awaited.shift();
  const last = awaited.length === 0;
  const canvas = tiles.get(camera) || tile(camera);
  try {
    const bitmap = await createImageBitmap(blob);
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
    }
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    canvas.dataset.frames = Number(canvas.dataset.frames || 0) + 1;
  } catch { /* a picture that cannot be read is left out */ }
  if (last) drawn();
}

function drawn() {
  requestAnimationFrame(() => {
    if (socket.readyState === WebSocket.OPEN) socket.send('{"drawn":1}');
  });
}

function begin(described) {
  const again = run !== null && run.id !== described.id;
  run = described;
  if (again) { rows = []; chunk = null; }
  document.title = `${run.robot} · rollout`;
  $("server").textContent = run.policy ? `${run.server} (${run.policy})` : run.server;
  $("tiles").replaceChildren();
  tiles.clear();
  run.cameras.forEach(tile);
  $("plots").replaceChildren();
  $("plots").classList.toggle("many", run.names.length > 6);
  plots = run.names.map(() => $("plots").appendChild(document.createElement("canvas")));
  openView();
}

function tile(camera) {
  const figure = $("tiles").appendChild(document.createElement("figure"));
  const canvas = figure.appendChild(document.createElement("canvas"));
  figure.appendChild(document.createElement("figcaption")).textContent = camera;
  figure.dataset.camera = camera;
  tiles.set(camera, canvas);
  return canvas;
}

async function openView() {
  const answer = await fetch("/scene/").catch(() => null);
  if (!answer || !answer.ok) {
    const text = document.createElement("p");
    text.textContent = answer ? await answer.text() : "The 3D view does not answer.";
    $("view").replaceChildren(text);
    return;
  }
  const frame = document.createElement("iframe");
  frame.title = "The arm in 3D";
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  frame.src = `/scene/?hideViserLogo&websocket=${scheme}://${location.host}/scene/`;
  frame.onload = () => {
    // Its own panel and notes would cover the arm; what they offer is not needed here.
    const style = frame.contentDocument.createElement("style");
    style.textContent = ".mantine-Notifications-root, .mantine-Paper-root { display: none !important; }";
    frame.contentDocument.head.append(style);
    // The space bar stops, also when the 3D view was clicked last.
    frame.contentWindow.addEventListener("keydown", key, true);
    frame.contentWindow.addEventListener("keyup", keyUp, true);
  };
  $("view").replaceChildren(frame);
}

// --------------------------------------------------------------------------------------------- words and buttons

function status(now) {
  $("step").textContent = now.step;
  $("rate").textContent = `${now.rate.toFixed(1)} Hz`;
  $("starved").textContent = now.starved;
  $("roundtrip").textContent = now.round_trip_ms === null ? "–" : `${now.round_trip_ms} ms`;
  $("prompt").placeholder = now.prompt || "Prompt";
  const trouble = now.error || (now.refused && now.refused !== "paused" ? `holds: ${now.refused}` : "");
  const connection = now.connection || {};
  $("connection").textContent = trouble || connection.text || connection.state || "–";
  $("connection").classList.toggle("bad", Boolean(trouble) || connection.state === "trouble");
}

function show() {
  const phase = state.phase;
  const running = phase === "running" || phase === "paused";
  const waiting = phase === "waiting" || phase === "judging";
  document.body.dataset.phase = phase;
  $("phase").textContent = PHASES[phase] || phase;
  if (state.episode !== undefined) {
    const shown = phase === "judging" || phase === "finished" ? state.last_episode : state.episode;
    $("episode").textContent = shown === null ? "–" : `${shown + 1} of ${Math.max(state.episodes, shown + 1)}`;
  }
  $("start").disabled = !(running || waiting || phase === "teleoperation");
  $("start").textContent = running ? "Reset" : "Start";
  $("start").title = running ? "End this episode and begin the next one" : `Begin episode ${(state.episode ?? 0) + 1}`;
  $("hold").disabled = !running;
  $("hold").textContent = phase === "paused" ? "Resume" : "Hold";
  const judging = running || (phase === "judging" && state.last_episode !== null);
  for (const name of ["success", "failure"]) {
    $(name).disabled = !judging;
    $(name).setAttribute("aria-pressed", Boolean(state.mark) && state.mark.success === (name === "success"));
  }
  $("quit").disabled = phase === "lost" || phase === "none" || phase === "finished" || phase === "leaving";
  $("prompt").disabled = $("setprompt").disabled = !state.prompt_editable || phase === "lost";
  if (document.activeElement !== $("prompt")) $("prompt").value = state.prompt || "";
}

let unanswered = 0;

function stop() {
  if (!send({ name: "stop" })) return;
  if (!ACTIVE.includes(state.phase)) return;
  $("stop").classList.add("sent");
  clearTimeout(unanswered);
  unanswered = setTimeout(() => notice("Stop was sent, and the robot has not confirmed it. Use the power switch if it moves."), 1000);
}

function stopped() {
  if (["starting", "moving", "running", "paused", "teleoperation"].includes(state.phase)) return;
  clearTimeout(unanswered);
  $("stop").classList.remove("sent");
  notice("");
}

function judge(name) {
  const episode = state.phase === "judging" ? state.last_episode : state.episode;
  send({ name, episode, note: $("note").value });
}

function typing(target) {
  return target instanceof Element && target.closest("input, textarea, [contenteditable='true']") !== null;
}

function key(event) {
  if (event.key === "Escape" && typing(event.target)) event.target.blur();
  if (event.code !== "Space" || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.ownerDocument === document && typing(event.target)) return;
  event.preventDefault();
  event.stopPropagation();
  if (!event.repeat) stop();
}

function keyUp(event) {
  // A button that has the focus would be pressed by the space bar as well.
  if (event.code === "Space" && !(event.target.ownerDocument === document && typing(event.target))) event.preventDefault();
}

// At the touch, not when the finger is lifted.
$("stop").addEventListener("pointerdown", (event) => { if (event.button === 0) stop(); });
$("stop").addEventListener("click", (event) => { if (event.detail === 0) stop(); });
$("start").addEventListener("click", () => {
  const running = state.phase === "running" || state.phase === "paused";
  if (!running) $("note").value = "";
  send({ name: running ? "reset" : "start", episode: state.episode });
});
$("hold").addEventListener("click", () => send({ name: state.phase === "paused" ? "resume" : "hold", episode: state.episode }));
$("success").addEventListener("click", () => judge("success"));
$("failure").addEventListener("click", () => judge("failure"));
$("note").addEventListener("change", () => { if (state.phase === "judging" && state.mark) judge(state.mark.success ? "success" : "failure"); });
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send({ name: "prompt", prompt: $("prompt").value });
  $("prompt").blur();
});
$("quit").addEventListener("click", () => {
  if (confirm("End the run? The robot goes into the state that --on-exit names.")) send({ name: "quit" });
});
document.addEventListener("keydown", key, true);
document.addEventListener("keyup", keyUp, true);

// ------------------------------------------------------------------------------------------------------- curves

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function drawPlots() {
  if (!run || rows.length === 0) return;
  const now = rows[rows.length - 1][0];
  const ahead = run.fps > 0 ? Math.min(2.5, Math.max(1, chunk ? chunk.rows.length / run.fps : 1)) : 1;
  const from = now - WINDOW_S;
  const shown = rows.filter((row) => row[0] >= from);
  const colors = Object.fromEntries(["measured", "commanded", "predicted", "faint", "quiet", "line", "text"].map((name) => [name, probe(name)]));
  plots.forEach((canvas, joint) => drawPlot(canvas, joint, shown, from, now, now + ahead, colors));
}

function probe(name) {
  // light-dark() is resolved by an element only.
  probe.element ??= document.body.appendChild(Object.assign(document.createElement("i"), { hidden: true }));
  probe.element.style.color = `var(--${name})`;
  return getComputedStyle(probe.element).color;
}

function drawPlot(canvas, joint, shown, from, now, to, colors) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const future = chunk ? chunk.rows.map((values, index) => [chunk.time + index / run.fps, values[joint]]).filter((p) => p[0] >= from) : [];
  const [low, high] = range(shown, joint, future);
  const top = 17, left = 0;
  const x = (time) => left + ((time - from) / (to - from)) * (width - left);
  const y = (value) => top + 2 + (1 - (value - low) / (high - low)) * (height - top - 5);

  pen.fillStyle = colors.quiet;
  for (let i = 1; i < shown.length; i++) {
    if (shown[i][6] !== "run") pen.fillRect(x(shown[i - 1][0]), top, x(shown[i][0]) - x(shown[i - 1][0]) + 0.5, height - top);
  }
  pen.lineWidth = 1;
  for (let i = 0; i < shown.length; i++) {
    const another = i > 0 && shown[i][5] !== shown[i - 1][5];
    if (!shown[i][4] && !another) continue;
    pen.strokeStyle = another ? colors.text : colors.faint;
    pen.globalAlpha = another ? 0.8 : 0.4;
    line(pen, [[x(shown[i][0]), top], [x(shown[i][0]), height]]);
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = colors.line;
  line(pen, [[x(now), top], [x(now), height]]);
  for (const [column, name, thick] of [[3, "predicted", 1.2], [2, "commanded", 1.6], [1, "measured", 1.6]]) {
    pen.strokeStyle = colors[name];
    pen.lineWidth = thick;
    line(pen, shown.map((row) => (row[column] && row[column][joint] !== null ? [x(row[0]), y(row[column][joint])] : null)));
  }
  pen.strokeStyle = colors.predicted;
  pen.setLineDash([4, 3]);
  line(pen, future.filter((p) => p[0] >= now).map(([time, value]) => [x(time), y(value)]));
  pen.setLineDash([]);

  const last = shown.length ? shown[shown.length - 1][1] : null;
  pen.fillStyle = colors.text;
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "left";
  pen.fillText(run.names[joint], 0, 12);
  pen.fillStyle = colors.faint;
  pen.font = "12px system-ui, sans-serif";
  pen.textAlign = "right";
  if (last && last[joint] !== null) pen.fillText(last[joint].toFixed(Math.abs(high) < 10 ? 2 : 1), width, 12);
}

function range(shown, joint, future) {
  let low = Infinity, high = -Infinity;
  const take = (value) => {
    if (value === null || value === undefined) return;
    if (value < low) low = value;
    if (value > high) high = value;
  };
  for (const row of shown) for (const column of [1, 2, 3]) if (row[column]) take(row[column][joint]);
  for (const point of future) take(point[1]);
  if (!(high >= low)) return [-1, 1];
  // A resting joint is a flat line, not magnified noise.
  const least = run.unit === "rad" ? 0.1 : 6;
  const middle = (low + high) / 2, half = Math.max(high - low, least) / 2;
  return [middle - half * 1.08, middle + half * 1.08];
}

function line(pen, points) {
  pen.beginPath();
  let down = false;
  for (const point of points) {
    if (point === null) { down = false; continue; }
    if (down) pen.lineTo(point[0], point[1]);
    else pen.moveTo(point[0], point[1]);
    down = true;
  }
  pen.stroke();
}

connect();
