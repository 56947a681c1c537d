"""What a caller gets: claims to bytes and back, and the keys that sign them. No policy in here."""
