"""The load test: plans requests, sends them open loop, and reports which target is better."""
