"""The page's style sheet; a module, because a data file would need packaging."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fff; --card: #f6f8fa; --text: #1b1f24; --soft: #59636e; --rule: #d5dae0; --link: #0550ae;
  --l: .53; --c: .17;
  --forward: #4878b0; --backward: #b3562a; --critic: #8250b4; --optimiser: #2e8555; --coding: #0e7c86;
  --transfer: #9a7400; --other: #8c959f; --hatch: #c9838a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --card: #1a2027; --text: #e3e8ee; --soft: #a0abb7; --rule: #353d47; --link: #79b8ff;
    --l: .78; --c: .14;
    --forward: #6ba3e0; --backward: #e88a58; --critic: #b98ae8; --optimiser: #5cc08a; --coding: #45bcc7;
    --transfer: #d3a928; --other: #77818c; --hatch: #8d5158;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 84rem; overflow-wrap: break-word;
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: .8rem 0 .3rem; }
p { margin: .25rem 0; }
a { color: var(--link); }
.soft, caption, figcaption { color: var(--soft); font-size: .875rem; }
.note::before { content: "\\26A0\\FE0E  "; }

.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: .4rem; }
.fit thead th, .fit tbody th { white-space: nowrap; min-width: 0; }
.fit { width: fit-content; max-width: 100%; margin-top: .6rem; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem .6rem; }
th, td { padding: .3rem .5rem; text-align: right; border-top: 1px solid var(--rule); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; line-height: 1.25; color: var(--soft); }
tbody th, thead tr:first-child th:first-child { text-align: left; }
th[colspan] { text-align: center; }
tbody th {
  position: sticky; left: 0; background: var(--page); font-weight: 600;
  min-width: min(9rem, 36vw); overflow-wrap: anywhere;
}
tbody th small { display: block; font-size: .8125rem; font-weight: 400; color: var(--soft); }
.run tbody th { background: var(--card); min-width: 0; }

.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
.run {
  min-width: 0; padding: .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
}
.run:only-child { grid-column: 1 / -1; }
.run h3 { margin-top: 0; }
.charts {
  display: grid; gap: .6rem 1rem; margin-top: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 27rem));
}
figure { margin: 0; }
details { margin-top: .3rem; }
summary { cursor: pointer; padding: .3rem 0; font-size: .875rem; }
pre { margin: 0 0 .5rem; font-size: .875rem; white-space: pre-wrap; overflow-wrap: anywhere; }

svg { display: block; width: 100%; height: auto; font: 14px system-ui, sans-serif; }
svg text { fill: var(--text); }
svg .name { fill: var(--soft); }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.line {
  fill: none; stroke: oklch(calc(var(--l) + var(--d, 0)) var(--c) var(--h));
  stroke-width: 2; stroke-linejoin: round; stroke-linecap: round;
}
svg .end { fill: oklch(var(--l) var(--c) var(--h)); font-weight: 600; }
rect { stroke: var(--page); stroke-width: .5; }
.forward { fill: var(--forward); }
.backward { fill: var(--backward); }
.critic { fill: var(--critic); }
.optimiser { fill: var(--optimiser); }
.transfer { fill: var(--transfer); }
.coding { fill: var(--coding); }
.other { fill: var(--other); }
.bubble { fill: url(#hatch); stroke: var(--hatch); stroke-width: .5; }
.hatch { stroke: var(--hatch); stroke-width: 2; }
.sent { fill: var(--forward); }
.codebook { fill: var(--critic); }
.serial { fill: var(--backward); }
.feedback { fill: var(--transfer); }
.raw { fill: var(--rule); }
.timeline svg { min-width: 1100px; padding: .5rem; }
.bar { width: 120px; height: 16px; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .2rem 0; }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; padding: 0;
  list-style: none; font-size: .875rem;
}
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; max-width: 100%; }
.legend span { overflow-wrap: anywhere; }
.legend svg { width: 24px; height: 12px; flex: none; }

@media (max-width: 30rem) {
  body { padding: .75rem; }
  .run { padding: .6rem; }
}
@media print {
  body { padding: 0; max-width: none; }
  nav { display: none; }
  .scroll { overflow: visible; border: 0; }
  .timeline svg { min-width: 0; }
  table { font-size: .75rem; }
  .fit thead th, .fit tbody th, td { white-space: normal; }
  th, td { padding: .2rem .3rem; }
  tbody th { position: static; min-width: 0; }
  .runs { grid-template-columns: 1fr; }
  .charts { grid-template-columns: 1fr 1fr; }
  .run, figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
