"""The page of `megarl watch`, which follows a run while it trains: reading its folder, what changed, and the server."""
