"""What tests share: forked runs, servers, tiny models and folders, workers, planted kills."""
