// Pen strokes as an image in MNIST's form. A stroke is a list of points [x, y] in any unit, y downwards.

const SIZE = 28, BOX = 20, MIDDLE = 14.5;  // MNIST's centre of mass lies on pixel 14, whose centre is 14.5
const PEN = 2.6;                           // width of strokes in MNIST's pixels: its median is 2.5
const EDGE = PEN / 2 + 0.5;                // from the middle of a stroke, where ink ends

function distanceToSegment(x, y, [ax, ay], [bx, by]) {
  const dx = bx - ax, dy = by - ay, length = dx * dx + dy * dy;
  const t = length ? Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / length)) : 0;
  return Math.hypot(x - ax - t * dx, y - ay - t * dy);
}

function draw(segments, right, down) {  // ink 0 to 1 of each pixel, from the distance of its centre to the nearest stroke
  const image = new Float64Array(SIZE * SIZE);
  for (const [a, b] of segments) {
    const [left, width, top, height] = [Math.min(a[0], b[0]) + right, Math.abs(a[0] - b[0]), Math.min(a[1], b[1]) + down, Math.abs(a[1] - b[1])];
    for (let row = Math.max(0, Math.floor(top - EDGE)); row < Math.min(SIZE, top + height + EDGE); row++)
      for (let column = Math.max(0, Math.floor(left - EDGE)); column < Math.min(SIZE, left + width + EDGE); column++) {
        const ink = Math.min(1, EDGE - distanceToSegment(column + 0.5 - right, row + 0.5 - down, a, b));
        image[row * SIZE + column] = Math.max(image[row * SIZE + column], ink);
      }
  }
  return image;
}

// 784 numbers from 0 to 255, row by row; null where nothing is drawn
export function toMnist(strokes) {
  const points = strokes.flat();
  if (!points.length) return null;
  let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [x, y] of points) [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
  const scale = (BOX - 2 * EDGE) / (Math.max(right - left, bottom - top) || 1);  // all ink fits into the box
  const place = ([x, y]) => [(x - (left + right) / 2) * scale, (y - (top + bottom) / 2) * scale];
  const segments = strokes.flatMap(stroke => stroke.map((point, i) => [place(point), place(stroke[Math.min(i + 1, stroke.length - 1)])]));
  let mass = 0, across = 0, along = 0;
  draw(segments, SIZE / 2, SIZE / 2).forEach((ink, i) => {
    mass += ink;
    across += ink * (i % SIZE + 0.5);
    along += ink * (Math.floor(i / SIZE) + 0.5);
  });
  const limit = shift => Math.max(-4, Math.min(4, shift));  // the box stays inside the image
  const centred = draw(segments, SIZE / 2 + limit(MIDDLE - across / mass), SIZE / 2 + limit(MIDDLE - along / mass));
  return Uint8Array.from(centred, ink => Math.round(255 * ink));
}

// How many digits seem to be drawn: groups of strokes that lie apart, each at least half as high as the highest.
// `pen` is the width of strokes, in the unit of the points.
export function countDigits(strokes, pen) {
  let boxes = [];
  for (const stroke of strokes) {
    const [across, down] = [0, 1].map(axis => stroke.map(point => point[axis]));
    let box = [Math.min(...across) - pen / 2, Math.max(...across) + pen / 2, Math.min(...down) - pen / 2, Math.max(...down) + pen / 2];
    for (;;) {  // a group that has grown may meet others
      const met = boxes.find(other => box[0] < other[1] && other[0] < box[1] && box[2] < other[3] && other[2] < box[3]);
      if (!met) break;
      boxes = boxes.filter(other => other !== met);
      box = box.map((edge, i) => i % 2 ? Math.max(edge, met[i]) : Math.min(edge, met[i]));
    }
    boxes.push(box);
  }
  const heights = boxes.map(box => box[3] - box[2]), least = Math.max(...heights) / 2;
  return heights.filter(height => height >= least).length;
}
