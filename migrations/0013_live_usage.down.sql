DROP TABLE invoicing;
DROP TABLE invoices;
DROP TABLE balance_watch;
DROP TABLE balance_alerts;
DROP TABLE usage_feed_open;
DROP TABLE usage_feed;
DROP TABLE usage_feeds;
