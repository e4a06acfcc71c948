// Asks the service.

export const readsPictures = true;
export const place = "Pictures are sent to this service, which keeps none.";

let token = sessionStorage.getItem("token");
export function useToken(text) {
  token = text.replace(/[^!-~]/g, "");  // a header can hold nothing else
  sessionStorage.setItem("token", token);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers }).catch(() => { throw new Error("The service does not answer."); });
  const content = await answer.json().catch(() => ({ detail: `The service answers with status ${answer.status}.` }));
  if (!answer.ok)
    throw Object.assign(new Error(content.detail), { needsToken: answer.status === 401, retryAfter: +answer.headers.get("Retry-After") });
  return content;
}

async function predict(type, body) {
  const { predictions: [found] } = await ask("v1/predict?top_k=10&image=true", { method: "POST", headers: { "Content-Type": type }, body });
  const probabilities = new Array(10).fill(0);
  for (const { digit, probability } of found.top_k) probabilities[digit] = probability;
  return { digit: found.digit, probabilities, warnings: found.warnings, pixels: found.image.flat() };
}

export const card = () => ask("v1/model");
export const judgePicture = file => predict("application/octet-stream", file);
export function judge(pixels) {  // 784 numbers from 0 to 255
  const rows = Array.from({ length: 28 }, (_, row) => Array.from(pixels.slice(28 * row, 28 * row + 28)));
  return predict("application/json", JSON.stringify({ images: [rows] }));
}
