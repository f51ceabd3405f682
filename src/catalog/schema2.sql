-- Schema version 2: what runs after the first have begun is found without reading all entries.
-- The first run, by far the largest, is left out: to ask for it is to ask for everything.

CREATE INDEX entries_begun ON entries (first_run) WHERE first_run > 1;
