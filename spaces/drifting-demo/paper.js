// A paper to draw on: its value is the drawing, a PNG with ink on nothing, and 'drawn' tells that a line is finished.
const paper = element.querySelector("canvas"), pen = paper.getContext("2d");
Object.assign(pen, { lineWidth: 14, lineCap: "round", lineJoin: "round", strokeStyle: "#0d9488" });
let drawing = false;

function place(event) {
  const box = paper.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * paper.width, (event.clientY - box.top) / box.height * paper.height];
}

paper.addEventListener("pointerdown", (event) => {
  drawing = true;
  paper.setPointerCapture(event.pointerId);
  pen.beginPath();
  pen.moveTo(...place(event));
  pen.lineTo(...place(event)); // a dot
  pen.stroke();
});
paper.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  pen.lineTo(...place(event));
  pen.stroke();
});
for (const end of ["pointerup", "pointercancel"]) {
  paper.addEventListener(end, () => {
    if (!drawing) return;
    drawing = false;
    props.value = paper.toDataURL("image/png");
    trigger("drawn");
  });
}
element.querySelector("button").addEventListener("click", () => {
  pen.clearRect(0, 0, paper.width, paper.height);
  props.value = "";
});
