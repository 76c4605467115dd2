"""Tables, pictures and reports of what runs wrote."""
