// A canvas to draw on with mouse, pen, finger or keys. Points are fractions of its sides.

const STEP = 0.04;         // of a side, for an arrow key
export const LINE = 1 / 13;  // width of the pen, of a side

export function createPad(canvas, onChange) {
  let strokes = [], open = false, pointer = null;      // whether the last stroke goes on; the pointer that draws it
  let cursor = [0.5, 0.3], keys = false;               // of the keyboard; whether it is shown
  const pen = canvas.getContext("2d");

  function paint() {
    const side = Math.round(canvas.clientWidth * devicePixelRatio) || 280, style = getComputedStyle(canvas);
    if (canvas.width !== side) canvas.width = canvas.height = side;
    pen.clearRect(0, 0, side, side);
    Object.assign(pen, { lineWidth: side * LINE, lineCap: "round", lineJoin: "round", strokeStyle: style.color });
    for (const stroke of strokes) {
      pen.beginPath();
      for (const [x, y] of [stroke[0], ...stroke]) pen.lineTo(x * side, y * side);
      pen.stroke();
    }
    if (!keys) return;
    pen.beginPath();
    Object.assign(pen, { lineWidth: side / 120, strokeStyle: style.accentColor });
    pen.arc(cursor[0] * side, cursor[1] * side, side / (open ? 40 : 22), 0, 7);
    pen.stroke();
  }
  function changed() {
    paint();
    onChange(strokes);
  }
  function show(those) {
    [strokes, open, pointer] = [those, false, null];
    paint();
  }
  function set(those) {
    show(those);
    onChange(strokes);
  }
  const undo = () => set(strokes.slice(0, -1));
  const clear = () => set([]);

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(part => Math.max(0, Math.min(1, part)));
  }
  canvas.addEventListener("pointerdown", event => {
    if (pointer !== null || event.button !== 0) return;  // a second finger, or the menu
    [pointer, keys, open] = [event.pointerId, false, true];
    canvas.setPointerCapture(pointer);
    strokes.push([place(event)]);
    changed();
  });
  canvas.addEventListener("pointermove", event => {
    if (event.pointerId !== pointer) return;
    strokes.at(-1).push(...(event.getCoalescedEvents?.() ?? []).map(place), place(event));
    changed();
  });
  for (const end of ["pointerup", "pointercancel"])
    canvas.addEventListener(end, event => { if (event.pointerId === pointer) [pointer, open] = [null, false]; });

  const arrows = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
  canvas.addEventListener("keydown", event => {
    if (event.altKey || (event.ctrlKey || event.metaKey) !== (event.key === "z")) return;
    const arrow = arrows[event.key];
    if (arrow) {
      cursor = cursor.map((part, i) => Math.max(0, Math.min(1, part + arrow[i])));
      if (open) strokes.at(-1).push([...cursor]);
    } else if (event.key === " ") {
      open = !open;
      if (open) strokes.push([[...cursor]]);
    } else if (event.key === "Backspace" || event.key === "z") undo();
    else if (event.key === "Escape") clear();
    else return;
    event.preventDefault();
    keys = true;
    if (arrow && !open) paint();  // the pen has moved, the drawing has not changed
    else changed();
  });
  canvas.addEventListener("blur", () => {
    [keys, open] = [false, false];
    paint();
  });
  const sizes = new ResizeObserver(paint), scheme = matchMedia("(prefers-color-scheme: dark)");
  sizes.observe(canvas);
  scheme.addEventListener("change", paint);
  paint();
  function destroy() {
    sizes.disconnect();
    scheme.removeEventListener("change", paint);
  }
  return { show, undo, clear, paint, destroy, get strokes() { return strokes; } };
}
