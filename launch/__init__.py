"""The recipes and their launch files, installed as `fastgrpo.launch`. Read `t2v_tiny.toml` first."""
