// The pad in JupyterLab. Python judges what is drawn: one question at a time, and the next one is about what is there by then.
function render({ model, el }) {
  el.addEventListener("keydown", event => event.stopPropagation());  // keys are for the widget, not for JupyterLab
  el.innerHTML = `<div class="mnist-nb digit-pad">
    <div><canvas class="pad" tabindex="0" role="application"
      aria-label="Paper to draw on. Arrows move the pen, space lowers and lifts it, backspace takes back, escape clears."></canvas>
    <div class="row"><button type="button" class="clear">Clear</button><button type="button" class="undo">Undo</button></div></div>
    <div class="answers"></div>
    <figure><canvas class="seen" width="28" height="28" role="img" aria-label="The drawing in 28 by 28 pixels"></canvas>
      <figcaption>28 × 28 pixels, as a model sees it</figcaption>
      <form class="row"><label>It is a <select class="label" aria-label="The digit that was meant"></select></label>
        <button class="keep">Keep as example</button></form>
      <small class="kept" role="status"></small></figure></div>`;
  const find = name => el.querySelector(`.${name}`);
  for (let digit = 0; digit < 10; digit++) find("label").append(new Option(digit, digit));

  let asked = 0, stale = false;
  function ask() {
    if (model.get("answers").to !== undefined && model.get("answers").to !== asked) return void (stale = true);
    stale = false;
    const pixels = toMnist(pad.strokes);
    showPixels(pixels);
    asked = (model.get("answers").to ?? 0) + 1;
    model.set("question", { number: asked, strokes: pad.strokes.map(stroke => [...stroke]) });
    model.set("pixels", new DataView((pixels ?? new Uint8Array()).buffer));
    model.save_changes();
  }
  function showPixels(pixels) {
    const pen = find("seen").getContext("2d"), image = pen.createImageData(28, 28);
    for (let i = 0; i < 784; i++) image.data.set([...Array(3).fill(255 - (pixels?.[i] ?? 0)), 255], 4 * i);
    pen.putImageData(image, 0, 0);
  }
  function showAnswers() {
    find("answers").innerHTML = model.get("answers").html ?? "";
    const best = model.get("answers").best;
    if (best !== undefined && best !== null) find("label").value = best;
    if (stale) ask();
  }
  const pad = createPad(find("pad"), ask);
  pad.set(model.get("question").strokes.map(stroke => [...stroke]));
  find("clear").onclick = pad.clear;
  find("undo").onclick = pad.undo;
  find("keep").closest("form").onsubmit = event => {
    event.preventDefault();
    model.send({ keep: +find("label").value });
  };
  const told = () => { find("kept").textContent = model.get("kept"); };
  model.on("change:answers", showAnswers);
  model.on("change:kept", told);
  showAnswers();
  return () => { model.off("change:answers", showAnswers); model.off("change:kept", told); };
}

export default { render };
