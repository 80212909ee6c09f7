// Arithmetic on vectors: cosines, and the plane that shows most of their differences.

const ROUNDS = 300;

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

function unit(vector) {
  const length = Math.sqrt(dot(vector, vector));
  return length > 0 ? vector.map((value) => value / length) : vector;
}

/** Cosine similarity of each with each. */
export function cosines(vectors) {
  const units = vectors.map(unit);
  return units.map((a) => units.map((b) => dot(a, b)));
}

/**
 * Principal components of the unit vectors: each one's place on the two axes along which they differ most,
 * and the share of all differences that these show. Power iteration on the N x N products, which are smaller
 * than the D x D covariance and have the same leading directions.
 */
export function plane(vectors) {
  const units = vectors.map(unit);
  const mean = units[0].map((_, d) => units.reduce((sum, v) => sum + v[d], 0) / units.length);
  const centred = units.map((v) => v.map((value, d) => value - mean[d]));
  const products = centred.map((a) => centred.map((b) => dot(a, b)));
  const total = products.reduce((sum, row, i) => sum + row[i], 0);
  const axes = [leading(products, [])];
  axes.push(leading(products, axes));
  const shown = axes.reduce((sum, axis) => sum + axis.value, 0);
  const places = units.map((_, i) => axes.map((axis) => Math.sqrt(axis.value) * axis.vector[i]));
  return { places, share: total > 1e-9 ? Math.min(1, shown / total) : 1 };
}

/** The leading eigenvector of a symmetric matrix among those at right angles to `others`. */
function leading(matrix, others) {
  let vector = matrix.map((_, i) => Math.sin(12.9898 * (i + 1) + others.length)); // any start will do, the same each time
  for (let round = 0; round < ROUNDS; round++) {
    for (const other of others) {
      const along = dot(vector, other.vector);
      vector = vector.map((value, i) => value - along * other.vector[i]);
    }
    vector = unit(vector);
    const next = matrix.map((row) => dot(row, vector));
    if (dot(next, next) < 1e-18) return { vector: matrix.map(() => 0), value: 0 };
    if (round === ROUNDS - 1) break;
    vector = next;
  }
  const value = Math.max(0, dot(vector, matrix.map((row) => dot(row, vector))));
  const far = vector.reduce((best, entry) => (Math.abs(entry) > Math.abs(best) ? entry : best), 0);
  return { vector: far < 0 ? vector.map((entry) => -entry) : vector, value };
}
