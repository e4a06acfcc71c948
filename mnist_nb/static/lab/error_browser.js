// Filters and a grid of images. Python filters and explains; here choices are made.
function render({ model, el }) {
  el.addEventListener("keydown", event => {  // plain keys are for the widget, JupyterLab's own combinations stay
    if (!event.ctrlKey && !event.metaKey && !(event.shiftKey && event.key === "Enter")) event.stopPropagation();
  });
  el.innerHTML = `<div class="mnist-nb error-browser">
    <form class="row" aria-label="Filter">
      <label>True <select data-name="true"></select></label>
      <label>Predicted <select data-name="predicted"></select></label>
      <label>Slice <select data-name="slice"></select></label>
      <label>Confidence <input data-name="low" type="number" min="0" max="1" step="0.05"> to
        <input data-name="high" aria-label="Confidence at most" type="number" min="0" max="1" step="0.05"></label>
      <label><input data-name="errors" type="checkbox"> errors only</label>
    </form>
    <p class="count" role="status"></p>
    <ul class="grid" aria-label="Images that match"></ul>
    <div class="row"><button type="button" class="back">Back</button><button type="button" class="on">On</button></div>
    <div class="detail" role="region" aria-label="The chosen image" aria-live="polite"></div></div>`;
  const find = name => el.querySelector(`.${name}`), inputs = [...el.querySelectorAll("[data-name]")];
  for (const name of ["true", "predicted"])
    for (const value of ["any", ..."0123456789"]) el.querySelector(`[data-name=${name}]`).append(new Option(value, value));
  for (const value of ["any", ...model.get("slices")]) el.querySelector("[data-name=slice]").append(new Option(value, value));

  const read = input => input.type === "checkbox" ? input.checked : input.type === "number" ? +input.value
    : /^\d$/.test(input.value) ? +input.value : input.value;
  const change = (name, value) => { model.set(name, value); model.save_changes(); };
  for (const input of inputs)
    input.onchange = () => change("filter", { ...model.get("filter"), [input.dataset.name]: read(input) });
  const turn = step => change("page", Math.max(0, model.get("page") + step));
  find("back").onclick = () => turn(-1);
  find("on").onclick = () => turn(1);

  function showFilter() {
    for (const input of inputs) {
      const value = model.get("filter")[input.dataset.name];
      if (input.type === "checkbox") input.checked = value;
      else input.value = value;
    }
  }
  function showGrid() {
    const { items = [], count = 0, first = 0 } = model.get("shown");
    find("count").textContent = count ? `${count.toLocaleString("en")} ${count === 1 ? "image" : "images"}`
      + (items.length < count ? `, ${first + 1} to ${first + items.length}` : "") : "No image matches.";
    find("grid").replaceChildren(...items.map(({ index, src, text }) => {
      const button = Object.assign(document.createElement("button"), { type: "button", title: text });
      button.dataset.index = index;
      button.append(Object.assign(new Image(48, 48), { src, alt: text, className: "digit" }));
      button.onclick = () => change("selected", index);
      const item = document.createElement("li");
      item.append(button);
      return item;
    }));
    find("back").disabled = first === 0;
    find("on").disabled = first + items.length >= count;
    mark();
  }
  function mark() {
    const buttons = [...find("grid").querySelectorAll("button")];
    for (const button of buttons) button.setAttribute("aria-pressed", +button.dataset.index === model.get("selected"));
    for (const button of buttons) button.tabIndex = -1;
    const chosen = buttons.find(button => button.ariaPressed === "true") ?? buttons[0];
    if (chosen) chosen.tabIndex = 0;
  }
  find("grid").onkeydown = event => {
    const buttons = [...find("grid").querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    const across = Math.max(1, buttons.filter(button => button.offsetTop === buttons[0].offsetTop).length);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
    if (step === undefined || at < 0) return;
    event.preventDefault();
    buttons[at + step]?.focus();
  };
  const showDetail = () => { find("detail").innerHTML = model.get("detail"); };
  const watched = { "change:filter": showFilter, "change:shown": showGrid, "change:selected": mark, "change:detail": showDetail };
  for (const [event, call] of Object.entries(watched)) {
    model.on(event, call);
    call();
  }
  return () => { for (const [event, call] of Object.entries(watched)) model.off(event, call); };
}

export default { render };
