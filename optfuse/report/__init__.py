"""The report of one run: one JSON document, and its renderings.

`schema` puts the document together and reads it back, `rows`, `bench` and `diff` say what stands in
every table of its kind, `illustrations` which plots go with them, and `comparison` does both for
several reports. `terminal`, `markdown` and `document` (HTML) draw that and know nothing else.
"""
