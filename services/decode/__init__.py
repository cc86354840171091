"""The decode worker: owns requests, pulls their prompt's KV blocks, and streams tokens back to routers."""
