"""The style sheet of the report: nothing is fetched, light and dark, from a phone's width on."""

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f4;--card:#fff;--ink:#16181d;--soft:#626975;--line:#e5e5df;--fill:#efefea;
--good:#14784a;--good-bg:#e4f3ea;--bad:#b42318;--bad-bg:#fcebe9;--warn:#8a5a00;--warn-bg:#fbf1dc;
--c0:#8b919c;--c1:#0b7a70;--c2:#c4561b;--c3:#5a4fc0;--c4:#b3306f;--c5:#3b7dc4;
--s1:#d9a520;--s2:#3f5f8a;--s3:#a9aeb8;--s4:#8fb4dc}
@media (prefers-color-scheme:dark){:root{--bg:#111317;--card:#191c21;--ink:#eceef1;--soft:#9aa2ae;--line:#2b2f36;
--fill:#22262c;--good:#5ed39a;--good-bg:#15301f;--bad:#ff8a7d;--bad-bg:#3a1a18;--warn:#f0c060;--warn-bg:#352a12;
--c0:#8d95a1;--c1:#35b8a8;--c2:#f08a4b;--c3:#9a90f5;--c4:#ee73ab;--c5:#6fb0f0;
--s1:#e0ba55;--s2:#5f86ba;--s3:#6b727e;--s4:#a9cbee}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15.5px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:70rem;margin:0 auto;padding:2.2rem 1.25rem 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.35rem);line-height:1.15;letter-spacing:-.02em;font-weight:650;margin:.35rem 0 .6rem}
h2{font-size:1.16rem;letter-spacing:-.01em;font-weight:650;margin:3rem 0 .25rem}
h3{font-size:1rem;font-weight:620;margin:0}
p{margin:.2rem 0 .9rem;max-width:46rem}
.eyebrow{font-size:.76rem;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);font-weight:600}
.soft,.lead{color:var(--soft)}.lead{font-size:1.02rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1.15rem 1.25rem;min-width:0}
.checks{margin:1rem 0 0;font-size:.9rem}
ul.checks{list-style:none;padding:0;display:grid;gap:.35rem .6rem;font-size:.86rem;line-height:1.4;
grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.checks li{padding:.38rem .75rem;border-radius:8px;background:var(--good-bg);color:var(--good);overflow-wrap:anywhere}
details.checks summary{cursor:pointer;color:var(--good);font-weight:560}
details.checks ul{margin-top:.5rem}
.checks li.bad{background:var(--bad-bg);color:var(--bad)}
.panels{display:grid;gap:1rem;margin-top:1.4rem}
.panel header{display:flex;flex-wrap:wrap;gap:.15rem .8rem;align-items:baseline;margin-bottom:.8rem}
.panel header span{color:var(--soft);font-size:.9rem}
.dot{display:inline-block;width:.62em;height:.62em;border-radius:50%;margin-right:.45em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:1rem 1.2rem}
.figure b{display:block;font-size:1.85rem;line-height:1.1;letter-spacing:-.03em;font-weight:640;
font-variant-numeric:tabular-nums}
.figure b small{font-size:.58em;font-weight:560;letter-spacing:0;margin-left:.15em}
.figure span{display:block;font-size:.84rem;color:var(--soft);line-height:1.35;margin-top:.2rem}
.figure em{font-style:normal;color:var(--ink);font-weight:560}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem;align-items:start}
.two>.whole{grid-column:1/-1}
.two>.card>h3{margin-bottom:.15rem}.two>.card>p{font-size:.88rem;line-height:1.45;margin-bottom:.7rem}
.pictures{display:grid;gap:.9rem;margin-top:.9rem}
.pictures figure{margin:0;padding:.75rem}
.strip{display:grid;gap:.5rem}
.strip div{min-width:0;font-size:.75rem;line-height:1.35;color:var(--soft)}
.strip img{display:block;width:100%;border-radius:7px;background:#fff;margin-bottom:.3rem}
.strip i{display:block;font-style:normal;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
figcaption{font-size:.9rem;line-height:1.35;margin-top:.5rem;overflow-wrap:anywhere}
.bars{display:grid;gap:.85rem;margin-top:1rem}
.bar-head{display:flex;justify-content:space-between;gap:1rem;font-size:.92rem;align-items:baseline}
.bar-head b{font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.bar-head span{min-width:0;overflow-wrap:anywhere}
.track{display:flex;height:.95rem;margin:.22rem 0;border-radius:5px;overflow:hidden;background:var(--fill)}
.track i{display:block;height:100%;min-width:1px}
.note{font-size:.82rem;color:var(--soft);line-height:1.4}
.undone{opacity:.72}.undone .bar-head span{text-decoration:line-through;text-decoration-thickness:1px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem;color:var(--soft);margin:.7rem 0 0}
.scroll{overflow-x:auto;margin:.8rem 0 0;padding:.25rem 0}
table{border-collapse:collapse;font-size:.9rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .75rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:560;color:var(--soft);font-size:.82rem;vertical-align:bottom}
th small{display:block;font-weight:400}
tr:last-child td{border-bottom:0}
.n{text-align:right}
td small{color:var(--soft);font-size:.86em}
.chip{display:inline-block;padding:.05rem .5rem;border-radius:99px;font-size:.8rem;font-weight:560;
background:var(--fill);color:var(--soft)}
.chip.good{background:var(--good-bg);color:var(--good)}.chip.bad{background:var(--bad-bg);color:var(--bad)}
svg{display:block;width:100%;max-width:36rem;height:auto;overflow:visible;
font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg text{fill:var(--soft)}svg .label{fill:var(--ink)}svg .name{font-size:11.5px}
svg .lead{stroke:var(--soft);stroke-width:.8}svg .grid{stroke:var(--line)}
svg .axis{stroke:var(--c0)}svg .curve{fill:none;stroke-width:2}
svg .hollow{fill:var(--card);stroke-width:2}
pre{background:var(--fill);border-radius:9px;padding:.8rem 1rem;overflow-x:auto;font-size:.85rem;margin:.6rem 0 0}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1.1rem;font-size:.9rem;margin:.8rem 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media (max-width:30rem){main{padding:1.4rem .9rem 3rem}.card{padding:.95rem .95rem}.figure b{font-size:1.6rem}
.pictures figure{padding:.6rem}}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""
