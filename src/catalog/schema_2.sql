-- Catalog, schema version 2: what somebody had to say about a run.

ALTER TABLE runs ADD COLUMN comment TEXT NOT NULL DEFAULT '';
