"""Generated from proto/ by tools/generate_pb.sh; never edited by hand."""
