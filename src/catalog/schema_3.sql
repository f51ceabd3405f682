-- Schema version 3.

-- Kinds of extended attributes that any version has, now or before: 'acl', 'label'. A mount says
-- of the others that there are none at all, and programs stop asking each file for them.
CREATE TABLE attribute_kinds (
    kind TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- What is found in a value or a target besides costs questions, not truth.
INSERT INTO attribute_kinds SELECT kind
    FROM (SELECT 'acl' AS kind, CAST('system.posix_acl_' AS BLOB) AS key
          UNION ALL SELECT 'label', CAST('security.selinux' AS BLOB))
    WHERE EXISTS (SELECT 1 FROM versions WHERE extra IS NOT NULL AND instr(extra, key) > 0);
