"""Self-contained HTML reports: one file, no network, readable without JavaScript. No torch.

A page is a list of sections, and a section is a title over a piece of HTML:

    sections = [Section("delta", "Gain over the baseline", render("intervals.html", rows=rows))]
    html = build_page("β × γ on VOC2007", sections, facts=["14 runs"], caveats=["one seed an arm"])

`page` has `Section`, `render` (a template of `templates/`, or of a folder of your own, with everything escaped) and
`build_page`. `charts` draws lines with bands, `bars` bars and intervals, `heat_map` tables of shaded cells,
`reliability` the diagram of calibration: all return markup that takes its colours from the page's scheme. `run` is what
the report of training runs knows of one; `contents` makes that report's sections.
"""
