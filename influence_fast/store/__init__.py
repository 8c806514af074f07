"""The gradient store on disk: written shard by shard, resumed, merged, verified, and read without copies."""
