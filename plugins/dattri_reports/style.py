"""The style sheet of reports: light and dark, wide and narrow, no font or image from elsewhere."""

STYLE = """
:root{--paper:#fbfaf6;--card:#fff;--ink:#1d1c1a;--soft:#66625a;--line:#dedacf;--help:#1b6e5a;
--harm:#b4541a;--wrong:#c2185b;--wrong-soft:#fbe4ee;--bar:#9cc7ba;--blue:27,110,90;--red:180,84,26}
@media (prefers-color-scheme:dark){:root{--paper:#16171a;--card:#1f2125;--ink:#eceae4;
--soft:#a29e95;--line:#373a40;--help:#5cc7a8;--harm:#f0a06a;--wrong:#ff6fa5;--wrong-soft:#46202f;
--bar:#2f6153;--blue:92,199,168;--red:240,160,106}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:56px 28px 96px}
h1,h2{font-family:ui-serif,Charter,"Iowan Old Style",Georgia,"Noto Serif",serif;font-weight:600;
line-height:1.15;letter-spacing:-.01em;text-wrap:balance}
h1{font-size:clamp(30px,4.6vw,50px);margin:.1em 0 .4em;max-width:19em}
h2{font-size:28px;margin:0 0 .35em}
h3{font-size:16px;font-weight:600;margin:26px 0 8px}
h3 small{font-weight:400;margin-left:6px}
h4{font-size:12px;font-weight:600;margin:0 0 6px}
p{max-width:70ch;margin:0 0 1em}
small{color:var(--soft);font-size:13px;line-height:1.4}
code,pre,.formula{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.9em}
.kicker{color:var(--help);font-weight:600;letter-spacing:.02em;margin:0}
.lead{font-size:19px;line-height:1.5;max-width:62ch}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:0 28px;
margin:34px 0 0;border-top:1px solid var(--line)}
.figures div{display:flex;flex-direction:column-reverse;justify-content:flex-end;padding:14px 0}
.figures dt{color:var(--soft);font-size:14px;line-height:1.35}
.figures dd{margin:0;font-size:27px;font-weight:600;font-variant-numeric:tabular-nums}
section{margin-top:64px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.methods{width:100%;min-width:860px}
.methods th,.methods td{padding:11px 18px 11px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
.methods th{font-weight:400}
.methods thead th{font-size:14px;font-weight:600;vertical-align:bottom}
.methods th small,.measure small{display:block;font-weight:400}
.methods tbody th{width:27%}
.methods tbody th code{font-weight:600;font-size:15px}
.methods .number{text-align:right;white-space:nowrap;padding-right:0;padding-left:14px}
.failed td{color:var(--soft);font-size:14px}
.none{color:var(--soft)}
.measure{display:grid;grid-template-columns:auto 1fr;column-gap:12px;align-items:center}
.measure small{grid-column:2;margin-top:-2px}
svg{display:block;max-width:100%;overflow:visible}
svg text{fill:var(--soft);font-size:11px}svg .level{font-size:9px}
.axis{stroke:var(--line)}.chance{stroke:var(--soft);stroke-dasharray:1 3;stroke-linecap:round}
.ceiling{stroke:var(--harm);stroke-dasharray:3 2}
.interval{fill:var(--bar)}.value{fill:var(--help)}
.notes{color:var(--soft);font-size:14px;line-height:1.5;padding-left:18px;max-width:86ch;
margin:18px 0 0}
.notes b{color:var(--ink);font-weight:600}
figure{margin:0}
.strip{display:flex;flex-wrap:wrap;gap:7px}
.train{width:54px;text-align:center;border-radius:4px}
.train img,.test img{display:block;width:100%;aspect-ratio:1;image-rendering:pixelated;
border:1px solid var(--line);border-radius:3px;background:#fff}
.train figcaption{font-size:13px;line-height:1.25;padding:3px 0 4px;
font-variant-numeric:tabular-nums}
.score{display:block;color:var(--soft);font-size:11px;white-space:nowrap}
.helpful h4,.helpful .score{color:var(--help)}.harmful h4,.harmful .score{color:var(--harm)}
.flipped{outline:3px solid var(--wrong);background:var(--wrong-soft)}
.flipped img{border-color:var(--wrong);border-radius:3px 3px 0 0}
.flipped figcaption{font-size:12px}
.truth{color:var(--wrong)}.flipped .truth{display:block}
details{border-top:1px solid var(--line)}
details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:13px 0}
summary code{font-weight:600;font-size:15px}
summary:focus-visible{outline:2px solid var(--help);outline-offset:2px}
.formula{color:var(--soft);max-width:none}
.row{display:grid;grid-template-columns:104px 1fr 1fr;gap:12px 30px;padding:20px 0 16px;
border-top:1px solid var(--line);align-items:start}
.test{width:104px}
.test figcaption{font-size:14px;line-height:1.3;padding-top:5px}
.test figcaption span{display:block;color:var(--soft);font-size:13px}
.mistaken b{color:var(--harm)}.mistaken img{border:2px solid var(--harm)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:28px 36px;
margin-top:22px}
.chart figcaption{margin-bottom:6px}
.chart code{font-weight:600}
.grid{stroke:var(--line);stroke-dasharray:2 4}.zero{stroke:var(--soft);stroke-width:1}
path.correct{fill:var(--bar);opacity:.75}
path.wrong{fill:none;stroke:var(--wrong);stroke-width:1.6}
.key::before{content:"";display:inline-block;width:14px;height:10px;margin-right:5px}
.key.correct::before{background:var(--bar)}
.key.wrong::before{height:0;border-top:2px solid var(--wrong);vertical-align:middle}
.matrix th{font-weight:400;padding:7px 12px;text-align:right;font-size:14px;white-space:nowrap}
.matrix thead th{text-align:center}
.matrix td{padding:9px 0;width:84px;min-width:64px;text-align:center;
border:2px solid var(--paper)}
.matrix .plus{background:rgba(var(--blue),calc(var(--strength)*.55))}
.matrix .minus{background:rgba(var(--red),calc(var(--strength)*.55))}
.matrix thead td{background:none}
.overview th,.overview td{padding:7px 18px 7px 0;text-align:right;
border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
.overview tr>:first-child{text-align:left}.overview thead th{vertical-align:bottom;font-size:14px;
font-weight:600;white-space:normal}.overview .best{font-weight:700;color:var(--help)}
.terms{display:grid;grid-template-columns:90px 1fr;gap:10px 18px;max-width:86ch;margin:0 0 28px}
.terms dt{font-weight:600}.terms dd{margin:0}
.sources{list-style:none;padding:0;margin:0 0 56px;max-width:100ch}
.sources li{padding:9px 0;border-top:1px solid var(--line)}
.sources code{font-weight:600;margin-right:10px}
.sources small{display:block}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:14px 16px;
overflow-x:auto}
.versions{color:var(--soft);font-size:14px}
@media (max-width:820px){main{padding:32px 16px 64px}section{margin-top:48px}
.row{grid-template-columns:1fr}.test{display:grid;grid-template-columns:72px 1fr;gap:12px;
width:auto;align-items:center}.test img{width:72px}.train{width:48px}
.terms{grid-template-columns:1fr;gap:2px}.terms dd{margin-bottom:12px}.lead{font-size:17px}}
@media print{details:not([open]){display:none}}
"""
