// A map of images: near a point, the pointer shows the point's image. Called like `render` of the confusion matrix.
function render({ model, el }) {
  if (!el.querySelector("svg")) el.innerHTML = model.get("html");
  const points = model.get("points");
  const tip = el.querySelector(".tip");
  for (const map of el.querySelectorAll("svg")) {
    const dots = [...map.querySelectorAll("circle[data-point]")].map(dot => ({
      x: +dot.getAttribute("cx"), y: +dot.getAttribute("cy"), point: +dot.dataset.point }));
    const ring = map.querySelector(".near");
    const hide = () => { tip.hidden = true; ring.setAttribute("r", 0); };
    const seek = event => {
      const box = map.getBoundingClientRect(), unit = map.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * unit, y = (event.clientY - box.top) * unit;
      const away = dot => Math.hypot(dot.x - x, dot.y - y);
      const nearest = dots.reduce((best, dot) => (away(dot) < away(best) ? dot : best));
      if (away(nearest) > 14 * unit) return hide();
      const { src, text } = points[nearest.point], outer = el.querySelector(".mnist-nb").getBoundingClientRect();
      const image = Object.assign(document.createElement("img"), { src, className: "digit", width: 84, height: 84, alt: "" });
      ring.setAttribute("cx", nearest.x);
      ring.setAttribute("cy", nearest.y);
      ring.setAttribute("r", 6);
      tip.replaceChildren(image, Object.assign(document.createElement("div"), { textContent: text }));
      tip.hidden = false;
      const left = event.clientX - outer.left + 16, right = outer.width - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(left, right))}px`;
      tip.style.top = `${event.clientY - outer.top + 16}px`;
    };
    map.addEventListener("pointermove", seek);
    map.addEventListener("pointerdown", seek);
    map.addEventListener("pointerleave", hide);
  }
}

export default { render };
