"""The report of one run: one JSON document, and its renderings.

`schema` puts the document together and reads it back, `rows` says what stands in every table,
`terminal` and `markdown` draw those tables and know nothing else.
"""
