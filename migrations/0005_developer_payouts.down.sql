DROP INDEX revenue_entries_at;
DROP TABLE discrepancies;
DROP TABLE book_comparisons;
DROP TABLE developer_withdrawals;
DROP FUNCTION refuse_payout_rewrite();
