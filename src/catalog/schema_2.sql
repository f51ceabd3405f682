-- Schema version 2.

-- What somebody had to say about a run.
ALTER TABLE runs ADD COLUMN comment TEXT NOT NULL DEFAULT '';

-- What runs after the first have begun is found without reading all entries. The first run, by far
-- the largest, is left out: to ask for it is to ask for everything.
CREATE INDEX entries_begun ON entries (first_run) WHERE first_run > 1;
