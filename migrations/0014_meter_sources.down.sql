DROP TABLE collector_leases;
DROP TABLE job_runs;
DROP TABLE meter_sources;
