"""Load tests of a served SAMP model: locust users, and `run.run_loadtest` for headless runs."""
