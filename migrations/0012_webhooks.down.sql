DROP INDEX outbox_forgettable;
DROP TABLE webhook_deliveries;
DROP TABLE webhook_fanout;
DROP TRIGGER outbox_queued ON outbox;
DROP FUNCTION queue_outbox();
DROP TABLE outbox_queue;
DROP TABLE webhook_endpoints;
