// The confusion matrix to click into. JupyterLab calls `render` through anywidget; the offline page calls it with a stand-in
// for the model. The table is there before, as HTML; here its cells become buttons, and a choice shows its images.
const STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
const AT_ONCE = 60; // images before one asks for all

const percent = share => `${(share * 100).toFixed(1)}%`;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function card(label, { index, src, top }) {
  const predictions = top.map(([digit, probability]) => `${digit} ${percent(probability)}`).join(", ");
  const image = element("img", { class: "digit", src, width: 56, height: 56, alt: `Image ${index}, true ${label}` });
  const words = [`#${index}`, `true ${label}`, predictions].map(text => element("div", {}, text));
  return element("li", { "data-index": index }, element("figure", {}, image, element("figcaption", {}, ...words)));
}

function showChoice(model, heading, images) {
  const choice = model.get("selected");
  if (!choice.length) {
    heading.textContent = "";
    return images.replaceChildren(element("p", {}, "Choose a cell to see its images."));
  }
  const [label, predicted] = choice;
  const { count, shown } = model.get("images")[`${label},${predicted}`] ?? { count: 0, shown: [] };
  const sample = shown.length < count ? `; a sample of ${shown.length}` : "";
  heading.textContent = `True ${label}, predicted ${predicted}: ${count.toLocaleString("en")} ${count === 1 ? "image" : "images"}${sample}`;
  const list = element("ul", { class: "cards", tabindex: 0, "aria-label": "Images of the chosen cell, surest first" },
    ...shown.slice(0, AT_ONCE).map(image => card(label, image)));
  images.replaceChildren(...(shown.length ? [list] : []));
  if (shown.length <= AT_ONCE) return;
  const more = element("button", { type: "button" }, `Show all ${shown.length}`);
  more.addEventListener("click", () => { list.append(...shown.slice(AT_ONCE).map(image => card(label, image))); more.remove(); });
  images.append(more);
}

function render({ model, el }) {
  if (!el.querySelector("table")) {
    el.innerHTML = model.get("html");
    const view = Math.random().toString(36).slice(2); // a second view of the same widget has a choice of its own
    for (const choice of el.querySelectorAll("input")) choice.name += view;
  }
  const heading = element("h3", { "aria-live": "polite" }), images = element("div"); // screen readers follow what stays
  el.querySelector(".chosen").replaceChildren(heading, images);
  const buttons = [...el.querySelectorAll("tbody tr")].map((row, label) => [...row.querySelectorAll("td")].map((cell, predicted) => {
    const button = element("button", { type: "button", tabindex: -1, "aria-label": cell.dataset.label }, ...cell.childNodes);
    button.addEventListener("click", () => { model.set("selected", [label, predicted]); model.save_changes(); });
    button.addEventListener("keydown", event => {
      const step = STEPS[event.key];
      if (!step) return;
      event.preventDefault(); // the page must not scroll
      event.stopPropagation(); // nor may JupyterLab move to another cell
      focus(label + step[0], predicted + step[1]);
    });
    cell.append(button);
    return button;
  }));

  function focus(label, predicted) {
    const target = buttons[label]?.[predicted];
    if (!target) return;
    for (const button of buttons.flat()) button.tabIndex = -1; // one stop for the Tab key: where the arrows left off
    target.tabIndex = 0;
    target.focus();
  }

  function update() {
    const [label, predicted] = model.get("selected");
    buttons.forEach((row, i) => row.forEach((button, j) => button.setAttribute("aria-pressed", i === label && j === predicted)));
    if (label !== undefined) buttons.flat().forEach(button => { button.tabIndex = button.getAttribute("aria-pressed") === "true" ? 0 : -1; });
    else buttons[0][0].tabIndex = 0;
    showChoice(model, heading, images);
  }

  model.on("change:selected", update);
  update();
  return () => model.off("change:selected", update); // when JupyterLab takes the view away
}

export default { render };
