-- The transaction of the owner's last batch: whether one whose commit was not answered is durable is seen here. The server's own word on a
-- number will not do. One that stopped without a checkpoint gives numbers once more whose transactions left no trace, and then tells
-- what became of whoever got the number after that.
ALTER TABLE slots ADD COLUMN batch xid8;
