// The order of search results: pages that explain come before references, and these before lists of changes.
// Sphinx's own weights, but for `score`.
"use strict";
var Scorer = {
  score: ([page, , , , score]) => {
    if (/^(learn|choosing|install|faster|tutorials\/)/.test(page)) return score + 4;
    if (/^dialects\//.test(page)) return score - 4;
    if (/^(changelog|contributing|releasing|testing|numbers|conduct|genindex)/.test(page)) return score - 6;
    if (/^(api|cli|recipes|security)/.test(page)) return score;
    return score + 3;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
