DROP TABLE quota_watch;
DROP INDEX vaults_with_quota;
DROP TABLE quota_requests;
DROP TABLE subscriptions;
