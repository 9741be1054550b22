DROP TABLE hold_extensions;
DROP TABLE external_holds;
DROP FUNCTION refuse_hold_rewrite();
