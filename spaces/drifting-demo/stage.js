// Paints what the server says: every value is one whole frame, and between two frames points glide.
const $ = (name) => element.querySelector(`[data-is="${name}"]`);
const PANELS = { particles: "#0d9488", generated: "#e2683c" };
const VIEW = { low: -0.04, span: 1.08 }; // of the plane
let frame = null, from = {}, to = {}, since = 0, pause = 90, running = false;

function fit(canvas) { // as many pixels as the screen has
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
  if (width && (canvas.width !== width || canvas.height !== height)) { canvas.width = width; canvas.height = height; }
  return { pen: canvas.getContext("2d"), width: canvas.width, height: canvas.height, ratio };
}

function dots(pen, points, size, radius) {
  pen.beginPath();
  for (let i = 0; i < points.length; i += 2) {
    const x = (points[i] / 1000 - VIEW.low) / VIEW.span * size, y = (1 - (points[i + 1] / 1000 - VIEW.low) / VIEW.span) * size;
    pen.moveTo(x + radius, y);
    pen.arc(x, y, radius, 0, 7);
  }
  pen.fill();
}

function paintTarget() {
  for (const name of Object.keys(PANELS)) {
    const { pen, width, ratio } = fit($(`${name}-target`));
    pen.clearRect(0, 0, width, width);
    pen.fillStyle = "rgba(140, 145, 155, 0.38)";
    dots(pen, frame.target, width, 1.5 * ratio);
  }
}

function paintPoints(share, clear) {
  for (const [name, colour] of Object.entries(PANELS)) {
    const { pen, width, ratio } = fit($(name));
    if (clear) pen.clearRect(0, 0, width, width);
    pen.globalCompositeOperation = "destination-out"; // what was there fades, and leaves a trail
    pen.fillStyle = "rgba(0, 0, 0, 0.16)";
    pen.fillRect(0, 0, width, width);
    pen.globalCompositeOperation = "source-over";
    pen.fillStyle = colour;
    const start = from[name], end = to[name];
    dots(pen, end.map((value, i) => start[i] + (value - start[i]) * share), width, 2.1 * ratio);
  }
}

function paintCurve() {
  const { pen, width, height, ratio } = fit($("curve"));
  const top = Math.log10(0.3), bottom = Math.log10(0.0005), pad = 6 * ratio, left = 44 * ratio;
  const x = (step) => left + (width - left - pad) * step / Math.max(1, frame.steps);
  const y = (value) => pad + (height - 2 * pad) * Math.min(1, Math.max(0, (top - Math.log10(Math.max(value, 1e-9))) / (top - bottom)));
  pen.clearRect(0, 0, width, height);
  pen.font = `${11 * ratio}px system-ui, sans-serif`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const line of [0.1, 0.01, 0.001]) {
    pen.fillStyle = "rgba(140, 145, 155, 0.9)";
    pen.fillText(line, left - 8 * ratio, y(line));
    pen.fillStyle = "rgba(140, 145, 155, 0.25)";
    pen.fillRect(left, y(line), width - left - pad, ratio);
  }
  Object.values(PANELS).forEach((colour, which) => {
    pen.beginPath();
    frame.energies.forEach((pair, step) => pen.lineTo(x(step), y(pair[which])));
    pen.strokeStyle = colour;
    pen.lineWidth = 2 * ratio;
    pen.lineJoin = "round";
    pen.stroke();
  });
}

function tell() {
  const last = frame.energies[frame.energies.length - 1], words = (value) => value.toFixed(4).replace("-", "−");
  $("step").textContent = `step ${frame.step} of ${frame.steps}`;
  $("particles-energy").textContent = words(last[0]);
  $("generated-energy").textContent = words(last[1]);
  $("stage").dataset.step = frame.step;
}

function glide() {
  const share = Math.min(1, (performance.now() - since) / pause);
  paintPoints(share, false);
  const over = performance.now() - since > 1500;
  if (over) paintPoints(1, true); // no trail stays behind
  running = !over;
  if (running) requestAnimationFrame(glide);
}

function show() {
  if (!props.value) return;
  const next = JSON.parse(props.value), now = performance.now(), fresh = !frame || next.step <= frame.step;
  const share = Math.min(1, (now - since) / pause);
  for (const name of Object.keys(PANELS)) { // from where they are seen, not from where they should be
    const last = from[name] && to[name] && !fresh ? to[name].map((value, i) => from[name][i] + (value - from[name][i]) * share) : next[name];
    from[name] = last.length === next[name].length ? last : next[name];
    to[name] = next[name];
  }
  if (!fresh) pause = Math.min(400, Math.max(30, 0.7 * pause + 0.3 * (now - since)));
  since = now;
  frame = next;
  paintTarget();
  if (fresh) paintPoints(1, true);
  paintCurve();
  tell();
  if (!running) { running = true; requestAnimationFrame(glide); }
}

function repaint() { // another size, or a tab that is seen again
  if (!frame) return;
  paintTarget();
  paintPoints(1, true);
  paintCurve();
}

new ResizeObserver(repaint).observe($("stage"));
watch("value", show);
show();
