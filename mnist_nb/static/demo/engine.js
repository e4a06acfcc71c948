// Runs the model in the browser.
import * as ort from "./ort.wasm.min.mjs";

export const readsPictures = false;
export const place = "The model runs in your browser: what you draw stays there.";
export const useToken = () => {};

ort.env.wasm.numThreads = 1;  // more would need headers that not every file server sends
ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
const session = ort.InferenceSession.create(new URL("model.onnx", import.meta.url).href);
const about = fetch("model.json").then(answer => answer.json());

export const card = () => about;
export const judgePicture = () => { throw new Error("Pictures need the service: mnist-serve."); };

const logSumExp = values => { const highest = Math.max(...values); return highest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - highest), 0)); };

export async function judge(pixels) {  // 784 numbers from 0 to 255
  const [model, { temperature = 1, unlike_below = -Infinity }] = await Promise.all([session, about]);
  const input = new ort.Tensor("uint8", Uint8Array.from(pixels), [1, 28, 28]);
  const output = await model.run({ [model.inputNames[0]]: input });
  const logits = Array.from(output[model.outputNames[0]].data), scaled = logits.map(value => value / temperature);
  const probabilities = scaled.map(value => Math.exp(value - logSumExp(scaled)));
  const warnings = logSumExp(logits) < unlike_below ? ["unlike any digit"] : [];
  return { digit: probabilities.indexOf(Math.max(...probabilities)), probabilities, warnings, pixels };
}
