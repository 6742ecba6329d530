"""Tables of words, which a phone shows as a list: a row below the other, each cell with the name of its column"""

import html
import re

TABLE = re.compile(r'(?<!<div class="arguments">\n)<table>\n<thead>.*?</table>', re.DOTALL)
CELL = re.compile(r'<td(?: style="[^"]*")?>(.*?)</td>', re.DOTALL)
HEAD = re.compile(r'<th(?: style="[^"]*")?>(.*?)</th>', re.DOTALL)
COLUMNS = range(3, 6)
WORDS = 9  # letters of a cell behind the first column, on average: a table of numbers or verdicts has fewer


def text_of(cell):
    "What is read in a cell, without tags"
    return html.unescape(re.sub(r'<[^>]+>', '', cell)).strip()


def as_rows(table):
    "A table of words with the names of its columns at its cells; any other table as it is"
    heads, cells = [text_of(h) for h in HEAD.findall(table)], [text_of(c) for c in CELL.findall(table)]
    fits = len(heads) in COLUMNS
    lengths = [sum(map(str.isalpha, c)) for i, c in enumerate(cells) if i % len(heads)] if fits else []
    if not lengths or sum(lengths) < WORDS * len(lengths):
        return table
    names = (html.escape(heads[i % len(heads)]) for i in range(len(cells)))
    named = CELL.sub(lambda m: f'<td data-label="{next(names)}">{m[1]}</td>', table)
    return f'<div class="rows">{named}</div>'


def with_rows(page):
    "A page with `as_rows` of all its tables"
    return TABLE.sub(lambda m: as_rows(m[0]), page)
