-- Charges that who paid them disputes, each once. An operator decides; a decision to refund stands before money moves
-- (REFUNDING), and says so after (REFUNDED). `moved_at`: when the status last changed.
CREATE TABLE disputes (
    dispute_id uuid PRIMARY KEY,
    vault_id   uuid NOT NULL REFERENCES vaults,
    event_id   uuid NOT NULL,
    user_id    uuid NOT NULL REFERENCES users,
    reason     text NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
    status     text NOT NULL DEFAULT 'OPEN' CHECK (status IN ('OPEN', 'REFUNDING', 'REFUNDED', 'UPHELD')),
    created_at timestamptz NOT NULL,
    moved_at   timestamptz NOT NULL,
    decided_at timestamptz,
    decided_by text CHECK (length(decided_by) BETWEEN 1 AND 255),
    notes      text CHECK (length(notes) BETWEEN 1 AND 1000),
    refunded   bigint CHECK (refunded > 0),
    UNIQUE (vault_id, event_id),
    CHECK ((status = 'OPEN') = (decided_at IS NULL) AND (decided_at IS NULL) = (decided_by IS NULL)),
    CHECK (notes IS NULL OR status <> 'OPEN'),
    CHECK ((status = 'REFUNDED') = (refunded IS NOT NULL))
);
CREATE INDEX disputes_of_user ON disputes (user_id, dispute_id);
CREATE INDEX disputes_by_status ON disputes (status, dispute_id);

-- What became of a dispute, step by step.
CREATE TABLE dispute_events (
    dispute_id uuid NOT NULL REFERENCES disputes,
    number     integer NOT NULL CHECK (number > 0),
    type       text NOT NULL CHECK (type IN ('opened', 'decided', 'refunded', 'taken_back')),
    at         timestamptz NOT NULL,
    -- What was decided, by whom and why; null where it is no decision.
    resolution text CHECK (resolution IN ('REFUNDED', 'UPHELD')),
    decided_by text,
    notes      text,
    amount     bigint,
    PRIMARY KEY (dispute_id, number),
    CHECK ((type = 'decided') = (resolution IS NOT NULL) AND (resolution IS NULL) = (decided_by IS NULL)),
    CHECK ((type = 'refunded') = (amount IS NOT NULL))
);

-- Only what one's own vault was charged can be disputed.
CREATE FUNCTION refuse_dispute() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status <> 'OPEN' OR NOT EXISTS (
        SELECT FROM vaults v JOIN usage_events u ON u.vault_id = v.vault_id
        WHERE v.vault_id = NEW.vault_id AND v.user_id = NEW.user_id AND u.event_id = NEW.event_id
            AND u.state = 'captured' AND u.amount > 0
    ) THEN
        RAISE EXCEPTION 'disputes: % did not pay for usage event %', NEW.user_id, NEW.event_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'disputes_of_own_charges';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER disputes_of_own_charges BEFORE INSERT ON disputes
    FOR EACH ROW EXECUTE FUNCTION refuse_dispute();

-- OPEN → UPHELD; OPEN → REFUNDING → REFUNDED, the last only with the ledger's entry beside it. REFUNDING → OPEN only where
-- others have given everything back, so that nothing can be given under this dispute any more.
CREATE FUNCTION refuse_dispute_move() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    booked   bigint;
    refunded bigint;
    captured bigint;
BEGIN
    IF (OLD.status, NEW.status) NOT IN (('OPEN', 'UPHELD'), ('OPEN', 'REFUNDING'), ('REFUNDING', 'REFUNDED'),
                                        ('REFUNDING', 'OPEN'))
       OR ROW (NEW.dispute_id, NEW.vault_id, NEW.event_id, NEW.user_id, NEW.reason, NEW.created_at)
          IS DISTINCT FROM ROW (OLD.dispute_id, OLD.vault_id, OLD.event_id, OLD.user_id, OLD.reason, OLD.created_at)
       OR NEW.status = 'REFUNDED' AND ROW (NEW.decided_at, NEW.decided_by, NEW.notes)
          IS DISTINCT FROM ROW (OLD.decided_at, OLD.decided_by, OLD.notes) THEN
        RAISE EXCEPTION 'disputes: what was asked is never changed, and what is decided is decided'
            USING ERRCODE = 'restrict_violation', CONSTRAINT = 'disputes_move_forwards';
    END IF;
    IF OLD.status = 'REFUNDING' THEN
        SELECT e.amount INTO booked FROM ledger_entries e
            WHERE e.vault_id = NEW.vault_id AND e.kind = 'refund' AND e.ref = 'dispute:' || NEW.dispute_id
                AND e.event_id = NEW.event_id;
        SELECT coalesce(sum(e.amount), 0) INTO refunded FROM ledger_entries e
            WHERE e.vault_id = NEW.vault_id AND e.event_id = NEW.event_id AND e.kind = 'refund';
        SELECT u.amount INTO captured FROM usage_events u
            WHERE u.vault_id = NEW.vault_id AND u.event_id = NEW.event_id;
        IF NEW.refunded IS DISTINCT FROM booked OR NEW.status = 'OPEN' AND refunded < captured THEN
            RAISE EXCEPTION 'disputes: the ledger says otherwise'
                USING ERRCODE = 'check_violation', CONSTRAINT = 'disputes_refunded_in_ledger';
        END IF;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER disputes_move_forwards BEFORE UPDATE ON disputes
    FOR EACH ROW EXECUTE FUNCTION refuse_dispute_move();

CREATE FUNCTION note_dispute_event() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    decides boolean := NEW.status = 'UPHELD' OR NEW.status = 'REFUNDING';
BEGIN
    INSERT INTO dispute_events (dispute_id, number, type, at, resolution, decided_by, notes, amount)
    SELECT NEW.dispute_id, 1 + count(*),
           CASE WHEN TG_OP = 'INSERT' THEN 'opened' WHEN decides THEN 'decided'
                WHEN NEW.status = 'REFUNDED' THEN 'refunded' ELSE 'taken_back' END,
           NEW.moved_at,
           CASE NEW.status WHEN 'UPHELD' THEN 'UPHELD' WHEN 'REFUNDING' THEN 'REFUNDED' END,
           CASE WHEN decides THEN NEW.decided_by END,
           CASE WHEN decides THEN NEW.notes END,
           NEW.refunded
    FROM dispute_events e WHERE e.dispute_id = NEW.dispute_id;
    RETURN NULL;
END $$;
CREATE TRIGGER disputes_noted AFTER INSERT OR UPDATE ON disputes
    FOR EACH ROW EXECUTE FUNCTION note_dispute_event();

CREATE TRIGGER disputes_never_deleted BEFORE DELETE ON disputes
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER disputes_never_emptied BEFORE TRUNCATE ON disputes
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER dispute_events_never_rewritten BEFORE UPDATE OR DELETE ON dispute_events
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER dispute_events_never_emptied BEFORE TRUNCATE ON dispute_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
