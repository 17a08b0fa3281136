"""What a run reads: prompts, embeddings, video files, and the tiny world that ships with the project."""
