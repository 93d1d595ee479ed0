"""How the report looks: one style sheet, inside the page. Light or dark as the reader's machine is; narrow windows get one column."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5b6470; --paper: #fff; --card: #f5f6f8; --edge: #d8dce2;
  --c0: #1f6fb4; --c1: #c25a0c; --c2: #14806a; --c3: #7a4fb0; --c4: #a8324a; --good: #14743f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --soft: #9aa4b1; --paper: #14171b; --card: #1e2329; --edge: #363d46;
  --c0: #6cb2ee; --c1: #f0a060; --c2: #58c9ae; --c3: #b899ea; --c4: #f08a9c; --good: #6fcf97; --bad: #ff8f87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 0 16px 64px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.2; margin: 28px 0 6px; }
h2 { font-size: 20px; margin: 44px 0 6px; padding-top: 10px; border-top: 1px solid var(--edge); }
p { margin: 6px 0 12px; max-width: 76ch; }
.soft, small, figcaption, .legend { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 12px 0; font-size: 14px; }
a { color: var(--c0); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 16px 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 14px; font-size: 13px; color: var(--soft); }
.tiles b { display: block; font-size: 20px; line-height: 1.3; color: var(--ink); font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: normal; }
.number { text-align: right; white-space: nowrap; }
td small { display: block; font-size: 12px; line-height: 1.3; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 18px 28px; }
figure { margin: 8px 0; max-width: 560px; }
figcaption { font-size: 14px; font-weight: 600; }
svg { overflow: visible; display: block; width: 100%; height: auto; color: var(--ink); }
svg text { font-size: 13px; fill: currentColor; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg path { fill: none; stroke: currentColor; }
svg .grid { stroke: var(--edge); stroke-width: 1; }
svg .line { stroke-width: 2; stroke-linejoin: round; }
svg .faint { stroke-width: 1; opacity: .5; }
svg .thin { stroke-width: 1; opacity: .5; }
svg .rule { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .whisker { stroke-width: 3; stroke-linecap: round; opacity: .55; }
svg .dot { fill: currentColor; stroke: none; }
svg .hollow { stroke-width: 2; fill: var(--paper); }
svg .slope { opacity: .75; stroke-linecap: round; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); } .s4 { color: var(--c4); }
.up { color: var(--good); } .down { color: var(--bad); } .same { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 0; font-size: 13px; }
.legend i { display: inline-block; width: 18px; margin-right: 6px; vertical-align: 4px; border-top: 3px solid currentColor; }
.legend i.faint { opacity: .5; } .legend i.rule { border-top: 2px dashed var(--soft); }
svg.bar { width: 120px; height: 8px; margin-top: 7px; background: var(--card); border-radius: 4px; }
svg.bar rect { fill: var(--c0); }
details { border-bottom: 1px solid var(--edge); padding: 7px 0; }
summary { cursor: pointer; }
.passage { background: var(--card); border-radius: 8px; padding: 8px 12px; margin: 8px 0; font-size: 14px; }
.passage p { margin: 4px 0; white-space: pre-wrap; }
.mark { display: inline-block; border: 1px solid currentColor; border-radius: 9px; padding: 0 7px; margin-right: 6px; font-size: 12px;
  white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.filter { font-size: 14px; margin-left: 4px; margin-right: 14px; }
#won:checked ~ .questions > :not(.won), #lost:checked ~ .questions > :not(.lost) { display: none; }
@media print { nav, .filter, input { display: none; } }
"""
