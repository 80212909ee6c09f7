// Which words two texts share, in order, and which only one of them has.

/** Words and signs of a text with the space before each; scripts without spaces are cut by the browser's own rules. */
export function words(text) {
  const found = [];
  let space = "";
  for (const { segment } of new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)) {
    if (segment.trim()) {
      found.push({ space, word: segment });
      space = "";
    } else {
      space += segment;
    }
  }
  return found;
}

/** For both texts, their words with `shared`: whether it is in the longest common subsequence. */
export function compare(before, after) {
  const [a, b] = [words(before), words(after)];
  const longest = Array.from({ length: a.length + 1 }, () => new Uint32Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i][j] = a[i].word === b[j].word ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i].word === b[j].word) {
      a[i++].shared = true;
      b[j++].shared = true;
    } else if (longest[i + 1][j] >= longest[i][j + 1]) {
      i++;
    } else {
      j++;
    }
  }
  return { before: a, after: b, shared: longest[0][0] };
}
