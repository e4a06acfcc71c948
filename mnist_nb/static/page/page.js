import { card, judge, judgePicture, place, readsPictures, useToken } from "./engine.js";
import { createPad, LINE } from "./pad.js";
import { countDigits, toMnist } from "./strokes.js";

const find = id => document.getElementById(id);
const percent = share => `${(100 * share).toFixed(share > 0.9995 ? 0 : 1)}%`;

const rows = Array.from({ length: 10 }, (_, digit) => {
  const row = find("bars").insertRow();
  row.innerHTML = `<th scope="row">${digit}</th><td><span class="bar"></span></td><td class="share"></td>`;
  return { row, bar: row.querySelector(".bar"), share: row.querySelector(".share") };
});

function showPixels(pixels) {
  const pen = find("seen").getContext("2d"), image = pen.createImageData(28, 28);
  pixels?.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
  pen.putImageData(image, 0, 0);
}

let speaking;
function show(found) {  // null: nothing is drawn
  const best = found?.digit ?? null;
  rows.forEach(({ row, bar, share }, digit) => {
    const probability = found && best !== null ? found.probabilities[digit] : 0;
    bar.style.setProperty("--share", probability);
    share.textContent = found ? percent(probability) : "";
    row.className = digit === best ? "best" : "";
  });
  const sure = best === null ? "" : percent(found.probabilities[best]);
  find("digit").textContent = best ?? "?";
  find("sure").textContent = sure;
  find("warnings").textContent = found?.warnings.join("; ") ?? "";
  showPixels(found?.pixels);
  clearTimeout(speaking);  // a screen reader hears where it ended, not each step on the way
  const said = [best === null ? "" : `${best}, ${sure}`, ...(found?.warnings ?? [])].filter(Boolean).join("; ");
  speaking = setTimeout(() => { find("spoken").textContent = said; }, 700);
}

function complain(error) {
  find("problem").textContent = error?.message ?? "";
  if (error?.needsToken) find("token").hidden = false;
}

// One question at a time; what was drawn meanwhile is asked about next, all in between is skipped.
let next, asking = false;
async function ask(question) {
  next = question;
  if (asking) return;
  const busy = now => { [asking, document.querySelector(".rest").ariaBusy] = [now, String(now)]; };
  busy(true);
  while (next) {
    const current = next;
    next = null;
    try {
      const found = await current();
      if (!next) show(found);
      complain();
    } catch (error) {
      if (!next) show(null);
      complain(error);
      if (!next && error.retryAfter) setTimeout(() => { if (!asking) ask(current); }, 1000 * error.retryAfter);
    }
  }
  busy(false);
}

const pad = createPad(find("pad"), strokes => {
  find("hint").hidden = strokes.length > 0;
  find("picture").hidden = true;
  const pixels = toMnist(strokes), digits = countDigits(strokes, LINE);
  ask(async () => {
    const found = pixels && await judge(pixels);
    if (digits > 1) found.warnings.unshift(`${digits} separate digits: they were read as one`);
    return found;
  });
});
find("undo").onclick = pad.undo;
find("clear").onclick = pad.clear;

function readPicture(file) {
  if (!file) return;
  pad.clear();
  URL.revokeObjectURL(find("picture").src);
  Object.assign(find("picture"), { src: URL.createObjectURL(file), hidden: false });
  find("hint").hidden = true;
  ask(() => judgePicture(file));
}
if (readsPictures) {
  find("choose").onclick = () => find("file").click();
  find("file").onchange = event => {
    readPicture(event.target.files[0]);
    event.target.value = "";  // the same file may be chosen again
  };
  addEventListener("paste", event => readPicture([...event.clipboardData.files][0]));
  addEventListener("dragover", event => event.preventDefault());
  addEventListener("drop", event => {
    event.preventDefault();
    readPicture(event.dataTransfer.files[0]);
  });
} else for (const part of document.querySelectorAll(".needs-service")) part.remove();
find("picture").onerror = () => { find("picture").hidden = true; };  // some formats the service reads and browsers do not

function describe({ arch, trained, metrics = {}, bytes }) {
  const { test_accuracy: accuracy, test_accuracy_interval: [low, high] = [], test_images: images } = metrics;
  const share = value => `${(100 * value).toFixed(2)}%`;
  const day = trained && new Date(trained).toLocaleDateString("en", { day: "numeric", month: "long", year: "numeric", timeZone: "UTC" });
  return [arch && `The model is “${arch}”, of ${(bytes / 1e6).toFixed(2)} MB${day ? `, trained on ${day}` : ""}.`,
    accuracy && `It recognises ${share(accuracy)} of ${images.toLocaleString("en")} test images (95% interval ${share(low)} to ${share(high)}).`,
    place].filter(Boolean).join(" ");
}
const showCard = () => card().then(found => { find("about").textContent = describe(found); }).catch(complain);

find("token").onsubmit = event => {
  event.preventDefault();
  useToken(find("secret").value);
  find("token").hidden = true;
  complain();
  showCard();
};
show(null);
showCard();
