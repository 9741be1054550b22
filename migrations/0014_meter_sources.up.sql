-- Where counters are collected from, how far, and what each run came to.

-- `endpoint_id` is what its charges are booked under: never offered to callers, so it is retired from its first moment.
-- `origin` says who keeps the row: the environment (made at each start, removed where it no longer names it) or an
-- operator. Only the one source that the environment does not describe further takes any node of any environment: its
-- expectations are empty. A credential is never here, only the name of the variable that holds it.
CREATE TABLE meter_sources (
    source_id            text PRIMARY KEY CHECK (source_id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    origin               text NOT NULL CHECK (origin IN ('environment', 'operator')),
    base_url             text NOT NULL CHECK (length(base_url) BETWEEN 1 AND 500),
    expected_node_id     text NOT NULL CHECK (length(expected_node_id) <= 200),
    expected_env         text NOT NULL CHECK (length(expected_env) <= 64),
    api_id               bigint NOT NULL REFERENCES apis,
    endpoint_id          bigint NOT NULL REFERENCES api_endpoints,
    enabled              boolean NOT NULL DEFAULT true,
    timeout_seconds      double precision NOT NULL CHECK (timeout_seconds > 0 AND timeout_seconds <= 60),
    first_seen           text NOT NULL CHECK (first_seen IN ('full', 'baseline')),
    reset                text NOT NULL CHECK (reset IN ('drop', 'count_new_total')),
    meter                text NOT NULL CHECK (meter ~ '^[a-z][a-z0-9_]{0,39}$'),
    region               text NOT NULL CHECK (length(region) <= 64),
    credential_env       text CHECK (credential_env ~ '^EXPORTER_TOKEN_[A-Z0-9_]{1,64}$'),
    last_completed_until timestamptz,
    last_attempted_at    timestamptz,
    last_succeeded_at    timestamptz,
    last_error           text NOT NULL DEFAULT '' CHECK (length(last_error) <= 300),
    created_at           timestamptz NOT NULL,
    updated_at           timestamptz NOT NULL,
    removed_at           timestamptz,
    CHECK (removed_at IS NULL OR NOT enabled)
);
-- Two sources of one node would share its counters' checkpoints and take each other's for resets.
CREATE UNIQUE INDEX meter_sources_node ON meter_sources (expected_env, expected_node_id) WHERE removed_at IS NULL;

-- A run that has ended, whatever came of it; what the process died in is not here.
CREATE TABLE job_runs (
    run_id            uuid PRIMARY KEY,
    job               text NOT NULL CHECK (job IN ('collect-and-rate', 'reconcile', 'ingest')),
    status            text NOT NULL CHECK (status IN ('ok', 'partial', 'error')),
    started_at        timestamptz NOT NULL,
    finished_at       timestamptz NOT NULL CHECK (finished_at >= started_at),
    processed_samples bigint NOT NULL CHECK (processed_samples >= 0),
    written_minutes   bigint NOT NULL CHECK (written_minutes >= 0),
    replayed_minutes  bigint NOT NULL CHECK (replayed_minutes >= 0),
    quarantined       bigint NOT NULL CHECK (quarantined >= 0),
    invalid           bigint NOT NULL CHECK (invalid >= 0),
    resets            bigint NOT NULL CHECK (resets >= 0),
    error             text NOT NULL CHECK (length(error) <= 2000),
    source_statuses   jsonb NOT NULL CHECK (jsonb_typeof(source_statuses) = 'array'),
    differences       jsonb NOT NULL CHECK (jsonb_typeof(differences) = 'array')
);
CREATE INDEX job_runs_latest ON job_runs (finished_at DESC, run_id DESC);

-- Which process collects (`loop`), and which is at it now (`run`).
CREATE TABLE collector_leases (
    name       text PRIMARY KEY CHECK (name IN ('loop', 'run')),
    holder     uuid,
    held_until timestamptz,
    CHECK ((holder IS NULL) = (held_until IS NULL))
);
INSERT INTO collector_leases (name) VALUES ('loop'), ('run');
