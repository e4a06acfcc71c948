// A slider for each amount of the augmentation. Python draws the grid and writes the code.
function render({ model, el }) {
  el.addEventListener("keydown", event => {  // plain keys are for the widget, JupyterLab's own combinations stay
    if (!event.ctrlKey && !event.metaKey && !(event.shiftKey && event.key === "Enter")) event.stopPropagation();
  });
  el.innerHTML = `<div class="mnist-nb playground"><form aria-label="Amounts"></form>
    <div><img class="grid" alt="Ten digits, above variants of each"><pre class="code" tabindex="0" aria-label="The recipe as code"></pre></div></div>`;
  const form = el.querySelector("form");
  const change = (name, value) => { model.set(name, value); model.save_changes(); };
  const rows = model.get("sliders").map(({ name, low, high, step, help }) => {
    const row = document.createElement("label");
    row.title = help;
    row.innerHTML = `<span>${name}</span><input type="range" data-name="${name}" min="${low}" max="${high}" step="${step}"><output></output>`;
    const [slider, said] = row.querySelectorAll("input, output");
    slider.oninput = () => {
      said.value = slider.value;
      change("amounts", { ...model.get("amounts"), [name]: +slider.value });
    };
    form.append(row);
    return { name, slider, said };
  });
  const again = Object.assign(document.createElement("button"), { type: "button", textContent: "Draw again" });
  again.onclick = () => change("seed", model.get("seed") + 1);
  form.append(again);
  for (const name of model.get("named")) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.onclick = () => model.send({ named: name });
    form.append(button);
  }
  const showAmounts = () => {
    for (const { name, slider, said } of rows) {
      if (+slider.value !== model.get("amounts")[name]) slider.value = model.get("amounts")[name];
      said.value = model.get("amounts")[name];
    }
  };
  const showGrid = () => { el.querySelector(".grid").src = model.get("src"); };
  const showCode = () => { el.querySelector(".code").textContent = model.get("code"); };
  const watched = { "change:amounts": showAmounts, "change:src": showGrid, "change:code": showCode };
  for (const [event, call] of Object.entries(watched)) {
    model.on(event, call);
    call();
  }
  return () => { for (const [event, call] of Object.entries(watched)) model.off(event, call); };
}

export default { render };
