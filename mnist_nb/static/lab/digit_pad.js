// The pad in JupyterLab. Python judges what is drawn: one question at a time, and the next one is about what is there by then.
function render({ model, el }) {
  el.addEventListener("keydown", event => {  // plain keys are for the widget, JupyterLab's own combinations stay
    if (!event.ctrlKey && !event.metaKey && !(event.shiftKey && event.key === "Enter")) event.stopPropagation();
  });
  el.innerHTML = `<div class="mnist-nb digit-pad">
    <div><canvas class="pad" tabindex="0" role="application"
      aria-label="Paper to draw on. Arrows move the pen, space lowers and lifts it, backspace takes back, escape clears."></canvas>
    <div class="row"><button type="button" class="clear">Clear</button><button type="button" class="undo">Undo</button></div></div>
    <div class="answers" role="status"></div>
    <figure><canvas class="seen" width="28" height="28" role="img" aria-label="The drawing in 28 by 28 pixels"></canvas>
      <figcaption>28 × 28 pixels, as a model sees it</figcaption>
      <form class="row"><label>It is a <select class="label" required aria-label="The digit that was meant"></select></label>
        <button class="keep">Keep as example</button></form>
      <small class="kept" role="status"></small></figure></div>`;
  const find = name => el.querySelector(`.${name}`);
  find("label").append(new Option("which digit?", ""));
  for (let digit = 0; digit < 10; digit++) find("label").append(new Option(digit, digit));

  let waiting = 0, stale = false, own;  // the number of the question under way, of this view; its strokes
  function ask() {
    const pixels = toMnist(pad.strokes), { to = 0 } = model.get("answers");
    showPixels(pixels);
    if (to < waiting) return void (stale = true);
    stale = false;
    waiting = 1 + Math.max(to, model.get("question").number);
    own = { number: waiting, strokes: pad.strokes.map(stroke => [...stroke]) };
    model.set("question", own);
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
    if (stale) ask();
  }
  const pad = createPad(find("pad"), ask);
  function showQuestion() {  // of another view, or set by Python
    const question = model.get("question");
    if (question.number === own?.number) return;
    pad.show(question.strokes.map(stroke => [...stroke]));
    showPixels(toMnist(pad.strokes));
  }
  find("clear").onclick = pad.clear;
  find("undo").onclick = pad.undo;
  find("keep").closest("form").onsubmit = event => {
    event.preventDefault();
    model.send({ keep: +find("label").value });
    find("label").value = "";  // the next drawing is another digit
  };
  const told = () => { find("kept").textContent = model.get("kept"); };
  model.on("change:answers", showAnswers);
  model.on("change:kept", told);
  model.on("change:question", showQuestion);
  const themes = new MutationObserver(() => pad.paint());  // JupyterLab's colours come from its theme
  themes.observe(document.body, { attributes: true });
  showQuestion();
  showAnswers();
  return () => {
    for (const [event, call] of [["answers", showAnswers], ["kept", told], ["question", showQuestion]]) model.off(`change:${event}`, call);
    themes.disconnect();
    pad.destroy();
  };
}

export default { render };
