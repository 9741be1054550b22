DROP TABLE dispute_events, disputes;
DROP FUNCTION refuse_dispute(), refuse_dispute_move(), note_dispute_event();
