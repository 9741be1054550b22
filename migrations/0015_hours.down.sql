DROP TABLE key_hours;
