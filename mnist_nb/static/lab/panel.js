// Choices, what Python drew of them, and a button.
function render({ model, el }) {
  el.addEventListener("keydown", event => {  // plain keys are for the widget, JupyterLab's own combinations stay
    if (!event.ctrlKey && !event.metaKey && !(event.shiftKey && event.key === "Enter")) event.stopPropagation();
  });
  el.innerHTML = `<div class="mnist-nb panel"><fieldset hidden><legend></legend></fieldset><div class="drawing"></div>
    <button type="button" hidden></button></div>`;
  const [choices, button] = el.querySelectorAll("fieldset, button"), drawing = el.querySelector(".drawing");
  const names = model.get("choices") ?? [];  // a training has none
  choices.querySelector("legend").textContent = model.get("legend") ?? "";
  choices.hidden = !names.length;
  for (const name of names) {
    const label = document.createElement("label"), box = Object.assign(document.createElement("input"), { type: "checkbox", value: name });
    label.append(box, ` ${name}`);
    choices.append(label);
    box.onchange = () => {
      model.set("chosen", [...choices.querySelectorAll("input:checked")].map(input => input.value));
      model.save_changes();
    };
  }
  button.onclick = () => model.send({ pressed: model.get("button") });
  const show = () => { drawing.innerHTML = model.get("html"); };
  const showButton = () => {
    button.hidden = !model.get("button");
    button.textContent = model.get("button");
  };
  const showChosen = () => { for (const box of choices.querySelectorAll("input")) box.checked = (model.get("chosen") ?? []).includes(box.value); };
  const watched = { "change:html": show, "change:button": showButton, "change:chosen": showChosen };
  for (const [event, call] of Object.entries(watched)) {
    model.on(event, call);
    call();
  }
  return () => { for (const [event, call] of Object.entries(watched)) model.off(event, call); };
}

export default { render };
