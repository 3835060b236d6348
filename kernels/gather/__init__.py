"""The kept K and V become the cache's storage."""
